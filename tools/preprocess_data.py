"""The same as `megarlhf preprocess`: python tools/preprocess_data.py --input TEXT --output-prefix CORPUS --tokenizer TOKENIZER."""

import sys

from megarlhf.preparation.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
