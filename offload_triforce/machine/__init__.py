"""What runs on what: sizes and speeds as people write them."""
