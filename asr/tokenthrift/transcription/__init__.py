"""The batch job: recordings of any length and format to text, subtitles and JSON, through any recognizer.

`job` is the work itself (`Transcriber`), `windows` cuts where it is quiet, `lips` pairs sound with lips in the picture,
`results` and `writers` hold and write what came out, `subtitles` makes cues, `references` scores against what was said,
`models` knows which class reads which model folder, `report` prints, and `cli` is the command.
"""

from tokenthrift.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"Segment": "results", "Transcriber": "job", "Transcription": "results", "load_recognizer": "models"},
    renamed={"load_recogniser": "load_recognizer"},
)
