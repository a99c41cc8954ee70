"""The language model on a device that works on its own while the host goes on: a torch model over `gpu.cuda.kernels.Kernels`.

All of it runs on CPU tensors too, with `gpu.cuda.reference.TorchKernels`, which is how it is tested where there is no GPU.
"""
