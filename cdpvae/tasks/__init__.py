"""What joins model, loss, data and evaluation for the training loop, a folder a task."""
