# SPDX-License-Identifier: Apache-2.0
"""Measures the rendered views of models: `python metrics.py -m MODEL [MODEL ...]`, see `--help`."""

from launch.measure import main
from launch.run import run_main

if __name__ == "__main__":
    run_main(main)
