"""Forward and backward passes of a training step as plain functions on tensors, without autograd in between."""
