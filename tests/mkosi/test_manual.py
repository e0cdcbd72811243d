# SPDX-License-Identifier: GPL-2.0-or-later
'''
The manual is true: its commands run, its examples work, its reference is
complete and its messages are those of the sources. What stands in a block
that no test here knows is an error.
'''

import ast
import configparser
from dataclasses import dataclass
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import textwrap
from typing import Dict, Iterator, List, Set

import pytest

from fixtures_builder import AMBIENT, PATIENCE, ROOT, Project
from fixtures_publish import Works
from mkosi_build import (cli, differences, error, lock as locks, registry,
                         tools)
from mkosi_build.resolve import KEYRING
from mkosi_build.store import host_mirrors
from test_resolve import link_store

pytest_plugins = ['fixtures_asset', 'fixtures_builder', 'fixtures_publish']

DOCS = ROOT / 'docs/devel/testing'
PAGES = {path.stem: path.read_text('utf-8')
         for path in sorted(DOCS.glob('mkosi-images*.rst'))}
REFERENCE = PAGES['mkosi-images-reference']
SOURCES = [*(ROOT / 'scripts/mkosi_build').glob('*.py'),
           *(ROOT / 'tests/functional/qemu_test').glob('*.py')]
FUNCTIONAL = 'docs/devel/testing/functional.rst'

# Directives whose content needs no test of its own
PLAIN = {'toctree'}
LANGUAGES = {'shell', 'python', 'yaml', 'ini', 'text', 'toml'}

# Names in examples, and what stands for them in a test
IMAGES = ('debian-min', 'fedora-min', 'debian-net')

# What may stand at the beginning of a command
PROGRAMS = {'scripts/mkosi-build.py', 'scripts/mkosi-matrix.py', 'export',
            'make', 'tar'}


# The pages

@dataclass(frozen=True)
class Block:
    '''A code block: where it is, its section, its language, its text.'''
    place: str
    section: str
    language: str
    text: str


def blocks_of(page: str, text: str) -> Iterator[Block]:
    '''The code blocks of a page, in order.'''
    lines = text.split('\n')
    section = ''
    for number, line in enumerate(lines):
        if re.fullmatch(r'-{3,}', line):
            section = lines[number - 1]
        match = re.fullmatch(r'( *)\.\. code-block:: (\w+)', line)
        if not match:
            continue
        body = []
        for inner in lines[number + 1:]:
            if inner and not inner.startswith(match[1] + '  '):
                break
            body.append(inner)
        yield Block(f'{page}:{number + 1}', section, match[2],
                    textwrap.dedent('\n'.join(body)).strip('\n') + '\n')


BLOCKS = [block for page, text in PAGES.items()
          for block in blocks_of(page, text)]


def written(language: str) -> List[Block]:
    '''The blocks in @language; there are some.'''
    found = [block for block in BLOCKS if block.language == language]
    assert found
    return found


def literals(text: str) -> List[str]:
    '''What stands between double backquotes.'''
    return [' '.join(found.split())
            for found in re.findall(r'``(.+?)``', text, re.S)]


def section_of(text: str, title: str) -> str:
    '''The section of a page below @title, to the next of its level.'''
    match = re.search(rf'^{re.escape(title)}\n([-~])\1+\n', text, re.M)
    assert match, title
    rest = text[match.end():]
    # A section ends where one of its own level or a higher one begins
    ends = '-' if match[1] == '-' else '-~'
    end = re.search(rf'^\S.*\n[{ends}]{{3,}}$', rest, re.M)
    return rest[:end.start()] if end else rest


def terms(text: str) -> List[str]:
    '''The terms of definition lists.'''
    found = re.findall(r'^(``.*``)\n +\S', text, re.M)
    return [term for line in found for term in literals(line)]


def test_every_block_is_known() -> None:
    '''No literal block that is none of a known language.'''
    for page, text in PAGES.items():
        for number, line in enumerate(text.splitlines(), 1):
            directive = re.match(r' *\.\. ([\w-]+)::', line)
            if directive and directive[1] not in {'code-block', *PLAIN}:
                pytest.fail(f'{page}:{number}: no test knows {line!r}')
            if line.endswith('::') and not directive:
                pytest.fail(f'{page}:{number}: say which language it is')
    assert {block.language for block in BLOCKS} == LANGUAGES
    assert sum(text.count('code-block::') for text in PAGES.values()) == len(
        BLOCKS)


def test_references(qemu_tree: Path) -> None:
    '''Every label is there, and functional.rst leads to the manual.'''
    text = '\n'.join(PAGES.values())
    qemus = (qemu_tree / FUNCTIONAL).read_text('utf-8')
    labels = re.findall(r'^\.\. _([\w-]+):$', text + qemus, re.M)
    assert len(set(labels)) == len(labels)
    used = re.findall(r':ref:`(?:[^`<]+<)?([\w-]+)>?`', text + qemus)
    assert 'mkosi-images-ref' in re.findall(r':ref:`([\w-]+)`', qemus)
    assert {'checkfunctional-ref', 'mkosi-images-ref'} <= set(used)
    assert {name for name in used if name.startswith(
        ('mkosi-', 'checkfunctional-'))} <= set(labels)


# Commands

def commands(block: Block) -> List[str]:
    '''The lines of a block of shell commands; each begins as we know.'''
    lines = block.text.replace('\\\n', ' ').splitlines()
    for line in lines:
        assert line.split()[0] in PROGRAMS, f'{block.place}: {line}'
    return lines


SCRIPTS: Dict[str, List[str]] = {}
for _block in written('shell'):
    SCRIPTS.setdefault(_block.section, []).extend(commands(_block))
SCRIPTS['in the text'] = sorted({
    literal for text in PAGES.values() for literal in literals(text)
    if literal.startswith('scripts/mkosi-build.py ')})


# Those that need sources to publish, and a mirror that has the tools
PUBLISHING = 'Publishing by hand'
PROVING = 'Proving an image'
LINKS = 'Whether everything can still be had'


def translated(line: str, project: Project) -> str:
    '''A command of the manual for @project, whose only image is mini.'''
    for name in IMAGES:
        line = re.sub(rf'\b{name}\b', 'mini', line)
    line = re.sub(r'\baarch64\b', 'x86_64', line)
    return line.replace('file:///srv/debian', project.mirror)


def resolves(lines: List[str]) -> bool:
    '''Whether some of these commands asks a mirror what it has.'''
    return '--update-lock' in ' '.join(lines)


# Commands that test_matrix.py runs, on rows
MATRIX = {title: SCRIPTS.pop(title) for title, lines in list(SCRIPTS.items())
          if 'mkosi-matrix.py' in ' '.join(lines)}


# What has come to pass before a command: a user has edited a definition, has
# built an image, is at another machine, which has no network.
STAGES = {
    'scripts/mkosi-build.py x86_64 debian-min --update-lock':
        ['sed -i s/mini-hello/busybox-static/ '
         'tests/functional/mkosi/mini/mkosi.conf'],
    'tar -C ~/.cache/qemu -cf mkosi-store.tar mkosi/store':
        ['scripts/mkosi-build.py x86_64'],
    'tar -C ~/.cache/qemu -xf mkosi-store.tar':
        ['rm -r ~/.cache/qemu/mkosi/{store,images} ~/.cache/qemu/download',
         'unset QEMU_MKOSI_MIRROR']}


QEMU = '''\
#!/bin/sh
echo READY
printf 'root# '
read -r line
test "$line" = poweroff
'''


def prepared(project: Project) -> Dict[str, str]:
    '''
    The environment of a user with @project: his home has the cache, where
    it is by default, and there are a QEMU and a make.
    '''
    home = Path(project.env['HOME'])
    (home / '.cache/qemu').mkdir(parents=True)
    (home / '.cache/qemu/mkosi').symlink_to(project.cache)
    programs = project.root / 'bin'
    programs.mkdir()
    # test_make() looks whether there are such targets
    for name, text in (('qemu', QEMU), ('make', '#!/bin/sh\n'),
                       ('python3',
                        f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    env = {name: value for name, value in project.environment().items()
           if name not in ('QEMU_MKOSI_DIR', 'QEMU_TEST_CACHE_DIR')}
    return {**env, 'PATH': f'{programs}:{env["PATH"]}',
            'QEMU_TEST_QEMU_BINARY': str(programs / 'qemu')}


def run_script(lines: List[str], project: Project) -> str:
    '''Run commands of the manual. Returns what they print.'''
    env = prepared(project)
    script = '\n'.join(['set -e', *(
        step for line in lines for step in
        (*STAGES.get(line, ()), f'echo \'+ {line}\'',
         translated(line, project)))])
    result = subprocess.run(
        ['bash', '-c', script], cwd=project.tree, env=env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding='utf-8', timeout=10 * PATIENCE,
        check=False)
    assert result.returncode == 0, result.stdout
    assert 'Traceback' not in result.stdout
    return result.stdout.replace(env['HOME'], '~')


@pytest.mark.slow
@pytest.mark.parametrize('section', [
    title for title, lines in SCRIPTS.items() if not resolves(lines)
    and title not in (PUBLISHING, LINKS)])
def test_commands(section: str, project: Project) -> None:
    '''Commands that need no network.'''
    lines = SCRIPTS[section]
    if section == PROVING:
        # It unpacks tools of its own; and the project's disk is none, where
        # test_structure.py looks into real ones
        link_store(project)
        lines = [line for line in lines if '--inspect' not in line]
        assert len(lines) == len(SCRIPTS[section]) - 1
    run_script(lines, project)


@pytest.mark.slow
def test_commands_that_publish(works: Works, tmp_path: Path) -> None:
    '''Of an image with sources, to a folder.'''
    lines = [line.replace('debian-min', 'mini').replace(
        '/srv', str(tmp_path)) for line in SCRIPTS[PUBLISHING]]
    (tmp_path / 'qemu-images').mkdir()
    python = tmp_path / 'bin/python3'
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = works.environment()
    result = subprocess.run(
        ['bash', '-e', '-c', '\n'.join(lines)], cwd=works.tree,
        env={**env, 'PATH': f'{python.parent}:{env["PATH"]}'},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding='utf-8', check=False)
    assert result.returncode == 0, result.stdout
    assert [path.name for path in (tmp_path / 'qemu-images').glob('*.json')]


@pytest.mark.slow
def test_commands_that_ask(project: Project, tmp_path: Path) -> None:
    '''Of a mirror that has everything, the tools too.'''
    for lock in (project.mkosi / 'tools').glob('*.lock'):
        for package in locks.load(lock).packages:
            path = tmp_path / 'mirror' / package.location
            path.parent.mkdir(parents=True, exist_ok=True)
            # Nobody looks into it
            with open(path, 'wb') as file:
                file.truncate(package.size)
    project.mirror += f' file://{tmp_path}/mirror'
    run_script(SCRIPTS[LINKS], project)


@pytest.fixture(name='online')
def fixture_online(project: Project) -> Project:
    '''A project with a real mirror beside its own, which has no lists.'''
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AMBIENT.items():
            patch.setenv(name, value)
        project.mirror = ' '.join([
            project.mirror, *(url for url in host_mirrors('debian')
                              if url.startswith('http'))])
    project.edit(project.registry, 'packages: 10', 'packages: 300')
    project.edit(project.registry, 'disk-bytes: 1', 'disk-bytes: 100')
    link_store(project)
    return project


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(not KEYRING.exists(), reason=f'needs {KEYRING}')
def test_commands_that_resolve(online: Project) -> None:
    '''
    Commands that need a mirror, of all sections one after the other, each
    once. What the manual says is printed to be repeated is printed.
    '''
    lines: Dict[str, str] = {}
    for found in SCRIPTS.values():
        if resolves(found):
            for line in found:
                lines.setdefault(translated(line, online), line)
    # With --boot at its end, a command does all that it does without
    said = run_script([line for key, line in lines.items()
                       if f'{key} --boot' not in lines], online)
    override = [line for line in lines if line.startswith('export')]
    assert len(override) == 1
    assert f'    {override[0]}\n' in said


def test_make(qemu_tree: Path) -> None:
    '''QEMU has the targets: its own manual names them.'''
    functional = (qemu_tree / FUNCTIONAL).read_text('utf-8')
    found = [line for lines in SCRIPTS.values() for line in lines
             if line.startswith('make ')]
    found += [literal for text in PAGES.values() for literal
              in literals(text) if re.match('make .*functional', literal)]
    assert found
    for line in found:
        assert f'{line}\n' in functional, line


def test_advice_of_the_sources() -> None:
    '''What the user shall install or switch is what the sources say.'''
    text = ' '.join(path.read_text('utf-8') for path in SOURCES)
    found = [literal for page in PAGES.values() for literal in literals(page)
             if re.match('(apt|apt-get|pip|sysctl|modprobe) .', literal)
             and literal not in MESSAGES]
    assert found
    for literal in found:
        assert literal in text


# Examples

def runnable(block: Block) -> str:
    '''The example as a test file of an image that there is.'''
    text = block.text.replace('debian-net', 'debian-min')
    if '__main__' not in text:
        base = 'LinuxKernelTest' if 'LinuxKernelTest' in text else 'MkosiTest'
        text += ('\n\nif __name__ == \'__main__\':\n'
                 f'    from qemu_test import {base}\n    {base}.main()\n')
    return text


@pytest.mark.slow
@pytest.mark.parametrize('block', written('python'),
                         ids=lambda block: block.place)
def test_python(block: Block, qemu_tree: Path, tmp_path: Path) -> None:
    '''An example is a test that passes, where the image was built.'''
    name = re.sub(r'\W', '_', f'test_{block.place}')
    path = qemu_tree / f'tests/functional/x86_64/{name}.py'
    path.write_text(runnable(block))
    qemu = shutil.which('qemu-system-x86_64')
    if not qemu:
        pytest.skip('needs qemu-system-x86_64')
    folders = [qemu_tree / 'python', qemu_tree / 'tests/functional']
    (tmp_path / 'Makefile.mtest').touch()
    result = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env={
            **os.environ, 'QEMU_TEST_QEMU_BINARY': qemu,
            'QEMU_BUILD_ROOT': str(tmp_path),
            'MESON_BUILD_ROOT': str(tmp_path),
            'PYTHONPATH': os.pathsep.join(map(str, folders))},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8',
        timeout=5 * PATIENCE, check=False)
    assert result.returncode == 0, result.stdout
    assert re.search('^ok 1 ', result.stdout, re.M), result.stdout
    assert 'not ok' not in result.stdout
    if '# SKIP' in result.stdout:
        assert 'scripts/mkosi-build.py' in result.stdout, result.stdout
        pytest.skip('the image is not built')


def test_python_types(qemu_tree: Path, tmp_path: Path) -> None:
    '''The examples are typed as all tests of ours.'''
    paths = []
    for number, block in enumerate(written('python')):
        paths.append(tmp_path / f'example_{number}.py')
        paths[-1].write_text(runnable(block))
    pytest.importorskip('mypy')
    result = subprocess.run(
        [sys.executable, '-m', 'mypy', '--strict', '--implicit-reexport',
         '--allow-untyped-calls', '--allow-subclassing-any',
         '--follow-imports=silent', f'--cache-dir={tmp_path}', *paths],
        env={**os.environ, 'MYPYPATH': os.pathsep.join(
            str(qemu_tree / name) for name in
            ('python', 'tests/functional', 'scripts'))},
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding='utf-8', check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize('block', written('yaml'),
                         ids=lambda block: block.place)
def test_yaml(block: Block, tmp_path: Path) -> None:
    '''
    A whole registry, of images that were not built yet; or what differs.
    '''
    path = tmp_path / 'registry.yaml'
    path.write_text(block.text)
    if 'differences:' in block.text:
        assert differences.load(path)
        return
    loaded = registry.load(path)
    assert loaded.images
    for image in loaded.images.values():
        assert not any(t.built for t in image.targets.values())


@pytest.mark.slow
@pytest.mark.parametrize('block', written('ini'),
                         ids=lambda block: block.place)
def test_ini(block: Block, tmp_path: Path, tools_tree: Path) -> None:
    '''A definition that the locked mkosi takes as it is.'''
    shutil.copytree(ROOT / 'tests/functional/mkosi/common',
                    tmp_path / 'common')
    folder = tmp_path / 'example'
    folder.mkdir()
    (folder / 'mkosi.conf').write_text(block.text)
    assert locks.definition_digest(folder)
    log = tmp_path / 'log'
    tools.mkosi(tools_tree, [f'--directory={folder}', 'summary'], log)
    said = log.read_text()
    conf = configparser.RawConfigParser(strict=False)
    conf.read(folder / 'mkosi.conf')
    assert conf['Output']['Seed'] in said
    # Of the included folder
    assert re.search('Output Format: disk$', said, re.M)
    assert not re.search('[Uu]nknown|[Ii]gnoring', said), said


def test_toml() -> None:
    '''A runner's settings, those that the pipeline itself names.'''
    script = (ROOT / '.gitlab-ci.d/mkosi-images.py').read_text('utf-8')
    block, = written('toml')
    assert block.text.startswith('[runners.docker]\n')
    option, = re.findall(r'^  security_opt = (\[.*\])$', block.text, re.M)
    assert f'security_opt =\n    {option} in its config.toml' in script
    assert json.loads(option)


def test_seeds_differ() -> None:
    '''Nobody's seed is that of an example.'''
    definitions = '\n'.join(
        path.read_text('utf-8') for path in
        (ROOT / 'tests/functional/mkosi').glob('*/mkosi.conf'))
    seeds = re.findall('^Seed=(.*)', '\n'.join(
        block.text for block in written('ini')), re.M)
    assert seeds
    assert not any(seed in definitions for seed in seeds)


@pytest.mark.parametrize('block', written('text'),
                         ids=lambda block: block.place)
def test_text(block: Block) -> None:
    '''A lock, in just the form that the builder writes.'''
    assert locks.render(locks.parse(block.text, 'manual')) == block.text


# The reference

def strings(node: ast.AST) -> List[str]:
    '''The string constants in @node.'''
    return [n.value for n in ast.walk(node)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def calls(path: Path) -> Iterator['tuple[str, ast.Call]']:
    '''The calls in a file, with the last part of the function's name.'''
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
        if isinstance(node, ast.Call):
            function = node.func
            yield (getattr(function, 'id', '')
                   or getattr(function, 'attr', '')), node


def test_registry_keys() -> None:
    '''All keys that the reader knows, and no others.'''
    known: Set[str] = set(registry.FORMATS)
    for name, call in calls(Path(registry.__file__)):
        if name == 'fields':
            known |= {text for argument in call.args[2:]
                      for text in strings(argument)}
    assert {'schema', 'not-locked', 'disk-boot-ratio', 'sha256'} <= known
    text = section_of(REFERENCE, 'The registry')
    assert set(terms(text)) == known
    for name in (*registry.ARCHITECTURES,
                 *(f for forms in registry.FORMATS.values() for f in forms)):
        assert name in literals(text)


def test_environment() -> None:
    '''All variables that the sources read, and no others.'''
    read = {text for path in SOURCES for name, call in calls(path)
            if name in ('getenv', 'get', 'pop') for argument in call.args[:1]
            for text in strings(argument)
            if re.fullmatch('(QEMU|MKOSI)_[A-Z_]+', text)}
    assert 'QEMU_MKOSI_DIR' in read
    assert set(terms(section_of(REFERENCE, 'Environment'))) == read
    used = set(re.findall(r'\bQEMU_[A-Z_]+\b', '\n'.join(PAGES.values())))
    # The one that is QEMU's alone, and those of its pipelines
    assert used - read == {'QEMU_TEST_NO_DOWNLOAD', 'QEMU_CI',
                           'QEMU_CI_UPSTREAM'}


def test_exit_codes() -> None:
    '''All of them.'''
    classes = [found for found in vars(error).values()
               if isinstance(found, type)
               and issubclass(found, error.BuildError)]
    codes = {0, *(found.exit_code for found in classes)}
    text = section_of(REFERENCE, 'Exit codes')
    told = re.findall(r'^(\d)     \S', text, re.M)
    assert sorted(map(int, told)) == sorted(codes)


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    '''All that --help shows, and no others.'''
    with pytest.raises(SystemExit):
        cli.parse_arguments(['--help'])
    shown = re.findall(r'^  (?:-\w, )?(--[\w-]+)', capsys.readouterr().out,
                       re.M)
    text = section_of(REFERENCE, 'The command')
    assert {'--help', '--jobs'} <= set(shown)
    assert set(terms(text)) == set(shown)
    used = set(re.findall(r'(?<=[ `])--[a-z][\w-]+',
                          '\n'.join(map('\n'.join, SCRIPTS.values()))))
    assert used <= set(shown)


def test_lock_header() -> None:
    '''All of its keys.'''
    assert set(terms(section_of(REFERENCE, 'Locks'))) == set(locks.HEADER)


def test_places() -> None:
    '''What knows of architectures is where the manual says.'''
    text = section_of(PAGES['mkosi-images-building'],
                      'Adding an architecture')
    found = re.findall(r'^``([A-Z_]+)`` in ``([\w/.]+)``', text, re.M)
    assert len(found) > 3
    for name, file in found:
        path, = (path for path in SOURCES if str(path).endswith(f'/{file}'))
        assert re.search(rf'^{name}\b.* = ', path.read_text(), re.M), name


# Messages

def template(node: ast.AST) -> str:
    '''A string of the sources, with a NUL for each value put into it.'''
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return ''.join(map(template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return '\0'


def pattern(message: str) -> 're.Pattern[str]':
    '''What finds the template of a message, where ... is for values.'''
    return re.compile('.*'.join(re.escape(part.strip())
                                for part in message.split('...')), re.S)


MESSAGES = [*terms(section_of(REFERENCE, 'Messages')),
            *terms(section_of(PAGES['mkosi-images-matrix'], 'Messages'))]


@pytest.mark.parametrize('message', MESSAGES)
def test_message(message: str) -> None:
    '''The sources have it.'''
    assert len(re.sub('[^a-z]', '', message)) >= 8, 'says nothing'
    found = {template(node) for path in SOURCES
             for node in ast.walk(ast.parse(path.read_text('utf-8')))}
    assert any(pattern(message).fullmatch(text) for text in found)


def test_all_messages() -> None:
    '''
    Every error that the builder raises, but for those of what is written
    wrongly in a registry, a lock or what is declared: they say all there is
    to say.
    '''
    classes = {name for name, found in vars(error).items()
               if isinstance(found, type)} | {'error', '__init__'}
    missing = []
    for path in SOURCES:
        if (path.parent.name != 'mkosi_build'
                or path.name in ('registry.py', 'record.py', 'nodes.py',
                                 'lock.py', 'differences.py', 'rows.py')):
            continue
        for name, call in calls(path):
            if name not in classes or not call.args:
                continue
            text = template(call.args[0])
            if len(re.sub('[^a-z]', '', text)) >= 8 and not any(
                    pattern(message).fullmatch(text)
                    for message in MESSAGES):
                missing.append(f'{path.name}: {text!r}')
    assert not missing
