from lora_tuner.cli.app import app

if __name__ == "__main__":
    app()
