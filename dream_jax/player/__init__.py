"""The player, which shows in a browser how a canvas was denoised: in replay files, and on the chat page of the server.

| file | responsible for |
|---|---|
| `pages.py` | puts the files below together to one HTML file that loads nothing from elsewhere |
| `record.py` | what the player needs to know about an answer of the sampler |
| `player.js`, `player.css` | the player |
| `replay.html`, `replay.js`, `replay.css` | the page around it in a replay file (`sample.py --replay`) |
| `chat.html`, `chat.js`, `chat.css` | the page around it in the server |
"""
