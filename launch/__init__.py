# SPDX-License-Identifier: Apache-2.0
"""How a run starts: configuration, command line, logs, progress and checks of the machine.

The only folder that reads the environment. It may import everything; nothing but the three scripts imports it.
"""
