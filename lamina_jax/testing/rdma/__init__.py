"""Virtual machines with RDMA devices, for tests and benchmarks on a machine without a network card."""
