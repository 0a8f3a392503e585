"""What a training loop needs: sums of gradients in buckets, optimizers, loss scaling."""
