"""The web page: a queue before one device, and the page itself, which needs gradio (`pip install 'mindsigma[web]'`)."""
