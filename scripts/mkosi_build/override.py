# SPDX-License-Identifier: GPL-2.0-or-later
'''
The override file: results of this machine that tests shall use in place
of the registry's hashes, while QEMU_TEST_MKOSI_OVERRIDE names the file.
'''

import json
from typing import Any, Dict

from .build import Result
from .cache import Cache, write_atomically

SCHEMA = 1


def load(cache: Cache) -> Dict[str, Any]:
    '''By image and architecture, what tests shall use.'''
    try:
        images = json.loads(cache.override.read_text())['images']
        return images if isinstance(images, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        # Only the builder writes it, and can write it anew
        return {}


def _save(cache: Cache, images: Dict[str, Any]) -> None:
    if images:
        content = {'schema': SCHEMA, 'images': images}
        write_atomically(cache.override, json.dumps(content, indent=1) + '\n')
    else:
        cache.override.unlink(missing_ok=True)


def add(cache: Cache, result: Result) -> None:
    '''Let tests use @result.'''
    job = result.job
    with cache.lock('override'):
        images = load(cache)
        images.setdefault(job.image.name, {})[job.target.arch] = {
            'identity': job.identity,
            'locked': job.locked,
            'artefacts': {kind: {'sha256': built.sha256, 'size': built.size}
                          for kind, built in result.artefacts.items()}}
        _save(cache, images)


def remove(cache: Cache, image: str, arch: str) -> None:
    '''Let tests use the registry's hashes again.'''
    if not cache.override.exists():
        return
    with cache.lock('override'):
        images = load(cache)
        images.get(image, {}).pop(arch, None)
        _save(cache, {name: targets for name, targets in images.items()
                      if targets})
