"""Peak memory of the loss and its gradient at a large vocabulary: in chunks, against whole logits; the same gradients. Each in a fresh process."""
