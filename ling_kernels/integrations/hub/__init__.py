"""The Triton half of the package as a kernel of the Hugging Face Hub: `python -m ling_kernels.integrations.hub FOLDER`.

layers.py is part of the kernel; write.py writes its repository.
"""
