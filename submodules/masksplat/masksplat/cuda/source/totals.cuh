// SPDX-License-Identifier: Apache-2.0
// What one binning counts on the device, for all kernels that come after it.
#pragma once

// Words of `totals`, (5) int, zeros at first.
constexpr int TOTAL_INSTANCES = 0;              // in use; 0 when they do not fit
constexpr int TOTAL_SPLATS = 1;                 // of the view
constexpr int TOTAL_TICKETS = 2;                // of the scans in `prepare` and in `emit`
constexpr int TOTAL_PARTS = 4;

// A few splats cover the whole image: instances of splats with more than FEW_TILES are dealt out to warps in parts.
// A part is (row of the splat, place of its first instance in depth order, number of that instance, instances <= PART).
constexpr int FEW_TILES = 16;
constexpr int PART = 256;
