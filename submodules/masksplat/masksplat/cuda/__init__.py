# SPDX-License-Identifier: Apache-2.0
"""The cuda body: `.cu` sources in source/, compiled at first use by NVRTC and launched on torch's current stream.

Nothing here needs nvcc, a CUDA toolkit or torch's headers. Importing this package imports no CUDA library.
"""
