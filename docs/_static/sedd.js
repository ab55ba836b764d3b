// The theme listens to the first button of each sidebar, which is in a header that it hides; the one that is seen passes its clicks on.
document.addEventListener("DOMContentLoaded", () => {
  for (const name of [".primary-toggle", ".secondary-toggle"]) {
    const [first, ...others] = document.querySelectorAll(name);
    for (const button of others) button.addEventListener("click", () => first.click());
  }
});
