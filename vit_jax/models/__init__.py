"""Networks: plain arguments in, Linen modules out."""
