from pathlib import Path
import json
def write_report(content, path: Path):
    path.write_text(json.dumps(content, indent=1))
