# SPDX-License-Identifier: Apache-2.0
"""The reference body: plain torch, any device, float32 and float64, differentiable by autograd.

It is the oracle of the other bodies and says in few lines what they compute. It is vectorised as far as torch
allows (see `compositing`), because it is also the peer in the benchmark of the cpu body.
"""
