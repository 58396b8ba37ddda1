# SPDX-License-Identifier: Apache-2.0
"""How work and rows are spread over ranks. The only folder that may import torch.distributed."""
