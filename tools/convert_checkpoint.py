"""The same as `megarlhf convert`: python tools/convert_checkpoint.py --from HUGGING_FACE_FOLDER --to CHECKPOINT, or the other way."""

import sys

from megarlhf.conversion.command import main

if __name__ == "__main__":
    sys.exit(main())
