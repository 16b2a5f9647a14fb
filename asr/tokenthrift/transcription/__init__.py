"""The batch job: recordings of any length and format to text, subtitles and JSON, through any recognizer.

`job` is the work itself (`Transcriber`), `recordings` what it works on, `windows` cuts where it is quiet, `lips` pairs
sound with lips in the picture, `alignment` times words, `results` and `writers` hold and write what came out,
`subtitles` makes cues, `outputs` and `journal` keep files safe from crashes, `references` scores against what was said,
`models` knows which class reads which model folder, `report` prints, `page` makes a page to look at, `engine` runs a
job here and `ray_engine` on a cluster, and `cli` is the command.
"""

from tokenthrift.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "FileTranscript": "results",
        "Recording": "recordings",
        "Segment": "results",
        "Transcriber": "job",
        "Word": "results",
        "load_recognizer": "models",
        "transcribe": "job",
    },
    renamed={"load_recogniser": "load_recognizer", "Transcription": "FileTranscript"},
)
