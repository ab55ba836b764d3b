"""What one training run needs: data, masks, validation, averages, logs, stopping, several processes."""
