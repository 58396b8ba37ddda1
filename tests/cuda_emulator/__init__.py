# SPDX-License-Identifier: Apache-2.0
"""Runs the `.cu` files of masksplat on the CPU, compiled by g++, so that kernels are tested without a GPU."""
