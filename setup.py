"""Package metadata.

`training/` and `model_cards/` are installed as `hf_intervene.training` and
`hf_intervene.model_cards`, so that the recipes and the template of the cards are there without a
checkout too."""

import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "hf_intervene" / "__init__.py").read_text())[1]

EXTRAS = {
    "eval": ["POT>=0.9.4", "scikit-learn>=1.4.2"],
    "app": ["gradio>=6.31,<7"],
    "baselines": ["pythae>=0.1.2"],
    "deepspeed": ["deepspeed>=0.19.8"],
    "docs": [
        "sphinx>=9",
        "myst-nb>=1.4",
        "furo>=2025.12.19",
        "jupytext>=1.19",
        "nbclient>=0.11",
        "ipykernel>=7.4",
    ],
    "test": [
        "pytest>=9.1",
        "pytest-xdist>=3.6.1",
        "hypothesis>=6.100",
        "mypy>=2.4.1",
        "ruff>=0.13",
        "POT>=0.9.4",
        "scikit-learn>=1.4.2",
        "gradio>=6.31,<7",
        "playwright>=1.65.2",  # drives a Chromium; where there is none its tests are skipped
    ],
}

setup(
    name="hf-intervene",
    version=VERSION,
    description=(
        "Concept interventions, and their unseen compositions, for pretrained diffusers and"
        " transformers models"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["hf_intervene", "hf_intervene.*"]),
        "hf_intervene.training",
        "hf_intervene.training.benchmarks",
        "hf_intervene.training.studies",
        "hf_intervene.model_cards",
    ],
    package_dir={
        "hf_intervene": "hf_intervene",
        "hf_intervene.training": "training",
        "hf_intervene.model_cards": "model_cards",
    },
    package_data={
        "hf_intervene": ["py.typed"],
        "hf_intervene.data": ["avatar_faces/*", "mnist_digits/*"],
        "hf_intervene.pretrained": ["*/*", "*/*/*"],
        "hf_intervene.training": [
            "configs/*.yaml",
            "configs/accelerate/*.yaml",
            "configs/reproduce/*.yaml",
        ],
        "hf_intervene.model_cards": ["template.md", "datasets/*.md"],
    },
    # The lower bounds, of the extras too, are the versions in `.ci/oldest.txt`: the tests pass with
    # exactly those.
    install_requires=[
        "torch>=2.11",
        "transformers>=5.12,<6",
        "diffusers>=0.38,<1",
        "accelerate>=1.10,<2",
        "peft>=0.18,<1",
        "datasets>=4.6,<6",
        "huggingface_hub>=1.23,<3",
        "filelock>=4",
        "jinja2>=3.1.5",
        "numpy>=2.0",
        "scipy>=1.15",
        "safetensors>=0.8",
        "pillow>=10.3",
        "matplotlib>=3.8.4",
        "pyyaml>=6.0.1",
        "tqdm>=4.66.3",
        "shtab>=1.7",
        "tensorboard>=2.18",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hf-intervene=hf_intervene.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
