"""`python -m megarlhf`."""

from megarlhf.cli import start

if __name__ == "__main__":
    start()
