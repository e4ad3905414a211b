"""The float32 projection that both engines call, and the products, cached weights and kernels below it."""
