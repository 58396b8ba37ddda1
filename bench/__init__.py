# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: each prints one table, writes JSON, and says for every target whether it is met (docs/benchmarks.md)."""
