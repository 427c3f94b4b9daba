"""Speed and memory of the product, beside peers and ceilings that are measured in the same run."""
