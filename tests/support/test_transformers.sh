#!/usr/bin/env bash
# Run tests with other versions of transformers: test_transformers.sh "5.0.0 newest" TEST...
# Each version has an environment in .venv-transformers/VERSION, which takes all other packages from .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."
versions=$1
shift
site_packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for version in $versions; do
    if [ "$version" = newest ]; then
        version=$(.venv/bin/python -m pip --disable-pip-version-check index versions transformers 2>/dev/null |
            sed -n 's/^Available versions: //p' | tr -d ' ' | tr , '\n' | grep -m 1 -E '^5\.[0-9]+\.[0-9]+$') ||
            { echo "error: the package index names no transformers 5" >&2; exit 1; }
    fi
    folder=.venv-transformers/$version
    if [ ! -e "$folder/.installed" ]; then
        echo "=== installing transformers $version into $folder"
        rm -rf "$folder"
        .venv/bin/python -m venv "$folder"
        own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        echo "$site_packages" > "$own/zz_base.pth"  # after the environment's own packages on the path
        # pip's remarks on what other packages of .venv require are expected: these versions are not the locked ones.
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "transformers==$version" 2> "$folder/pip.log" ||
            { cat "$folder/pip.log" >&2; exit 1; }
        # What users combine with transformers, and the lock leaves out: their tests run here only (docs/compatibility.md).
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
            peft==0.21.2 accelerate==1.15.0 trl==1.16.0
        touch "$folder/.installed"
    fi
    echo "=== tests with transformers $version"
    PYTHONPATH=$PWD TESTED_TRANSFORMERS=$version "$folder/bin/python" -m pytest -q "$@"
done
