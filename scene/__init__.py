# SPDX-License-Identifier: Apache-2.0
"""What is reconstructed: cameras, data sets, images, the table of Gaussians, ply files. Knows nothing of drawing."""
