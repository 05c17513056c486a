"""Copy the model's code into an exported folder, under names that differ where the code differs.

transformers copies the code of all exports of the same folder name into one folder, and Python keeps one module of each
name. So each file's name ends with a hash of all files; the classes keep their names.
"""

import re
from pathlib import Path

import infini_ds.model
from infini_ds.utils.hashing import sha256_of_json

MODEL = Path(infini_ds.model.__file__).parent
HASH_DIGITS = 10
AUTO_CLASSES = {
    "AutoConfig": ("configuration", "InfiniGPTNeoConfig"),
    "AutoModel": ("modeling", "InfiniGPTNeoModel"),
    "AutoModelForCausalLM": ("modeling", "InfiniGPTNeoForCausalLM"),
    "AutoModelForSequenceClassification": ("modeling", "InfiniGPTNeoForSequenceClassification"),
}
RELATIVE_IMPORT = re.compile(r"^(\s*from \.)(\w+)( import\b)", re.MULTILINE)


def write_code(folder: Path, source: Path = MODEL) -> dict[str, str]:
    """Write the files that the model's classes need to `folder`, and return the `auto_map` of config.json.

    Args:
        source: the folder of the model's code.
    """
    texts = _read_with_imports(source, sorted({module for module, _ in AUTO_CLASSES.values()}))
    suffix = sha256_of_json(texts)[:HASH_DIGITS]
    for module, text in texts.items():
        renamed = RELATIVE_IMPORT.sub(rf"\g<1>\g<2>_{suffix}\g<3>", text)
        (folder / f"{module}_{suffix}.py").write_text(renamed, encoding="utf-8")
    return {auto_class: f"{module}_{suffix}.{name}" for auto_class, (module, name) in AUTO_CLASSES.items()}


def _read_with_imports(source: Path, modules: list[str]) -> dict[str, str]:
    """Return the text of some modules and of all that they import from their own folder, by sorted name."""
    texts: dict[str, str] = {}
    while modules:
        module = modules.pop()
        if module not in texts:
            texts[module] = (source / f"{module}.py").read_text(encoding="utf-8")
            modules += [name for _, name, _ in RELATIVE_IMPORT.findall(texts[module])]
    return dict(sorted(texts.items()))
