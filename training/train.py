"""Train an intervention head (METHOD section 3; arXiv:2507.04754).

    accelerate launch training/train.py --config training/configs/quad.yaml --output_dir outputs/q

The settings are those of `hf_intervene/trainer/sections.py`: a YAML file gives some, the command
line overrides them. The training itself is `hf_intervene/trainer/loop.py`, from top to bottom.
`hf-intervene train` is the same command."""

import sys

from hf_intervene.trainer.command import main


if __name__ == "__main__":
    sys.exit(main())
