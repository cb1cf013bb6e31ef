"""A server for people and for clients of OpenAI's API: `serve.py`.

| module | responsible for |
|---|---|
| `tasks` | what the engine is asked to do, and what it reports |
| `reader` | text that can change no more, from a row that is being denoised |
| `programs` | a bounded number of compiled programs |
| `engine` | the queue, and the batches whose rows come and go, in a thread of its own |
| `requests` | the fields of a request, checked, and the tasks of a request |
| `responses` | answers in the form of OpenAI's API, whole or in chunks |
| `metrics` | numbers for Prometheus |
| `app` | endpoints, keys, limits, errors |
| `server` | the port and the signals |

Web packages are imported in this module only; the extra `serve` installs them.
"""
