"""The wire contract of camserve: generated from the `.proto` files beside this module."""
