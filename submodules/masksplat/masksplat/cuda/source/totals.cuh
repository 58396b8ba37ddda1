// SPDX-License-Identifier: Apache-2.0
// What one binning counts on the device, for all kernels that come after it.
#pragma once

// Words of `totals`, (4) int, zeros at first.
constexpr int TOTAL_INSTANCES = 0;              // in use; 0 when they do not fit
constexpr int TOTAL_SPLATS = 1;                 // of the view
constexpr int TOTAL_TICKETS = 2;                // of the scans in `prepare` and in `emit`
