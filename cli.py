from lora_tuner.cli import app

if __name__ == "__main__":
    app()
