# SPDX-License-Identifier: Apache-2.0
"""Renders the views of a trained model: `python render.py -m MODEL`, see `--help`."""

from launch.render_views import main
from launch.run import run_main

if __name__ == "__main__":
    run_main(main)
