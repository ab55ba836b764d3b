"""The style sheet of the report: one column on a phone, a grid of figures on a desk, black on white in print."""

CSS = """
:root { --ink: #1c1c1c; --soft: #5c5c5c; --line: #d9d9d9; --blue: #0072B2; --wash: #f4f7fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 70rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0.5rem 0 0.75rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
.lead { font-size: 1.1rem; max-width: 46rem; margin: 0 0 1rem; }
.note { background: #fff6e0; border-left: 4px solid #E69F00; padding: 0.5rem 0.9rem; max-width: 46rem; }
.how { color: var(--soft); max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
nav a { color: var(--blue); padding: 0.2rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 700; padding-bottom: 0.4rem; }
th, td { padding: 0.35rem 0.7rem; text-align: right; vertical-align: baseline; }
th:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid var(--ink); font-size: 0.85rem; vertical-align: bottom; }
tbody th { font-weight: 600; }
.better, .ci { display: block; font-weight: 400; font-size: 0.78rem; color: var(--soft); white-space: nowrap; }
.best { font-weight: 700; }
td[data-label="sedd"] { background: var(--wash); }
td[data-label="sedd"].best { color: var(--blue); }
.anchor { font-style: italic; color: var(--soft); }
.reading td { text-align: left; color: var(--soft); font-size: 0.85rem; padding: 0 0 0.6rem; border-bottom: 1px solid var(--line); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: 0.88rem; color: var(--soft); margin-top: 0.3rem; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.5rem 2.5rem; align-items: start; }
.settings { font-size: 0.88rem; table-layout: fixed; }
.settings th { font-weight: 400; color: var(--soft); width: 45%; overflow-wrap: anywhere; }
.settings td { text-align: left; overflow-wrap: anywhere; }
.settings tr { border-bottom: 1px solid #eeeeee; }
@media (max-width: 40rem) {
  body { padding: 0.75rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .lead { font-size: 1rem; }
  .gallery, .runs { grid-template-columns: 1fr; }
  .scroll thead { display: none; }
  .scroll table, .scroll tbody, .scroll caption { display: block; }
  .scroll tbody { border: 1px solid var(--line); border-radius: 0.5rem; margin: 0.75rem 0; padding: 0.6rem 0.8rem; }
  .scroll tr, .scroll th { display: block; padding: 0; text-align: left; }
  .scroll .better { display: inline; margin-left: 0.5rem; }
  .scroll tr:not(.reading) td { display: flex; justify-content: space-between; gap: 1rem; padding: 0.15rem 0.3rem; }
  .scroll tr:not(.reading) td::before { content: attr(data-label); color: var(--soft); font-weight: 400; font-style: normal; }
  .reading td { display: block; border: 0; padding: 0.4rem 0 0; }
}
@media print {
  @page { margin: 15mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2, caption { break-after: avoid; }
  tbody, figure, .settings { break-inside: avoid; }
  .scroll { overflow: visible; }
  .gallery { grid-template-columns: 1fr 1fr; }
  .runs { display: block; }
}
"""
