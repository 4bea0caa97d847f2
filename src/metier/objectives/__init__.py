"""What to minimise: pure functions of tensors. Each gives a sum and its weight; the loop divides once."""
