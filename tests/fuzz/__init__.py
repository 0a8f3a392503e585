"""A fuzzer: random programs under random plans, each compared with the original model on one device."""
