# Shared by the scripts of this folder: a virtual environment with the pinned versions.
# Source it from the repository root. PYTHON names the interpreter to start from (3.11+).

fail() {
    echo "error: $*" >&2
    exit 2
}

# make_environment EXTRAS: .venv, filled once per version of the two files that decide its content.
make_environment() {
    local extras=$1 python=${PYTHON:-python3} stamp
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || fail "$python is not Python 3.11 or newer; set PYTHON to one that is"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    stamp=$(cat constraints.txt setup.py | sha256sum | cut -d' ' -f1)-$extras
    if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
        # pip of the environment, from where it looks by itself: the index may hold local builds.
        # Of some 19,000 modules only those that are imported get compiled, when they are imported.
        .venv/bin/python -m pip install --quiet --no-compile -c constraints.txt \
            torch setuptools wheel ninja
        .venv/bin/python -m pip install --quiet --no-compile -c constraints.txt \
            --no-build-isolation -e ".[$extras]"
        echo "$stamp" >.venv/installed
    fi
    # The deepspeed launcher and ninja start further programs by name.
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
    # DeepSpeed compiles a small operation at its first start. A killed compilation leaves a lock
    # that later ones would wait for without end; in a folder of our own an old one can be removed.
    export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
    find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +5 -delete 2>/dev/null || true
}

# Without CUDA the launcher would look for GPUs in vain: name the accelerator and count processes.
launcher_for() {
    local ranks=$1
    if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "deepspeed --num_gpus $ranks --module"
    else
        export DS_ACCELERATOR=cpu
        echo "deepspeed --num_accelerators $ranks --module"
    fi
}
