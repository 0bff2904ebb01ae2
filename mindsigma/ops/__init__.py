"""Mathematical building blocks shared by the models: pure functions of tensors, and the cell that compiles them."""
