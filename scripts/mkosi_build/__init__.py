# SPDX-License-Identifier: GPL-2.0-or-later
'''Builds the images of the functional tests, the same bytes for everybody'''
