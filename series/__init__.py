# SPDX-License-Identifier: GPL-2.0-or-later
'''
The harness: what makes the files of this repository a change to QEMU.

It applies them, and the anchored edits of edits.yaml, to a copy of a real
QEMU tree and runs QEMU's own functional tests there.  From left to right:
error, edits (text to text), tree (obtains a QEMU tree), apply (tree to
copy), kvm, tap, functional (runs the tests), cases (what a test fetches),
before (compares), lint, lines (counts them), later (which wait for a patch),
commits (tree to commits and mail), verify, __main__ (the command).
'''
