"""Write the table of transformers' training arguments anew, from the installed version."""

import json

import transformers

from llava_ft.args.flags import TABLE, fields_of_transformers

if __name__ == "__main__":
    rows = [f"    {json.dumps(name)}: {json.dumps(field)}" for name, field in fields_of_transformers().items()]
    version = json.dumps(transformers.__version__)
    TABLE.write_text(f'{{\n  "transformers": {version},\n  "fields": {{\n' + ",\n".join(rows) + "\n  }\n}\n")
