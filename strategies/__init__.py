# SPDX-License-Identifier: Apache-2.0
"""What changes the set of Gaussians: density control, masks, and the schedules that they follow."""
