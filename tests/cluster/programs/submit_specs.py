"""Submit jobs from the login node through bbu.jobs, and print each one's id and log folder as JSON.

`submit_specs.py PROFILE JOBS`: JOBS is a JSON list of mappings with the fields of a JobSpec. The `resources` of a job
are changes to those that the profile states for training.
"""

import dataclasses
import json
import sys
from pathlib import Path

from bbu.jobs.clusters import load_profile
from bbu.jobs.spec import JobSpec
from bbu.jobs.submission import submit_jobs

profile = load_profile(sys.argv[1])
specs = [
    JobSpec(
        name=job["name"],
        commands=tuple(tuple(command) for command in job["commands"]),
        nodes=job["nodes"],
        tasks_per_node=job.get("tasks_per_node", 1),
        resources=dataclasses.replace(profile.train, **job.get("resources", {})),
        after=tuple(job.get("after", ())),
        max_requeues=job.get("max_requeues", 3),
    )
    for job in json.loads(sys.argv[2])
]
submissions = submit_jobs(tuple(specs), profile, Path.cwd(), lambda text: None)
print(json.dumps([[each.job_ids[0], str(each.folders[0])] for each in submissions]))
