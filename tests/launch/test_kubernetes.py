"""launch/kubernetes.sh and the JobSet manifests it fills in, held against Kubernetes' own types."""

import io
import json
import tarfile
from types import SimpleNamespace

import pytest

yaml = pytest.importorskip("yaml", reason="pip install pyyaml")

GIVEN = {"RUN_NAME": "digits", "KUBE_IMAGE": "registry/image:1", "RUN_BUCKET": "bucket"}


@pytest.fixture
def kubernetes(fake):
    return lambda *words, **settings: fake.run("kubernetes.sh", *words, **{**GIVEN, **settings})


@pytest.fixture
def manifest(kubernetes, fake):
    """manifest("tpu", ...) -> what was handed to kubectl."""

    def apply(kind, **settings):
        done = kubernetes("apply", kind, **settings)
        assert done.returncode == 0, done.stderr
        return yaml.safe_load((fake.base / "manifest").read_text())

    return apply


def container_of(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return job, spec, spec["template"]["spec"], container


CLAIM = {"RUN_BUCKET": "", "KUBE_CLAIM": "runs"}


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
@pytest.mark.parametrize("settings", [{}, {**CLAIM, "RUN_SPOT": "0", "KUBE_GPU_LABEL": ""}])
def test_a_manifest_is_of_the_types_of_kubernetes(manifest, kind, settings):
    """A field that Kubernetes does not have is lost on the way through its own classes."""
    client = pytest.importorskip("kubernetes.client", reason="pip install kubernetes")
    jobset = manifest(kind, **settings)
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"} and jobset["kind"] == "JobSet"
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert set(jobset["spec"]) <= {"failurePolicy", "network", "replicatedJobs"}
    api = client.ApiClient()

    def through(value, kind):
        found = api.deserialize(SimpleNamespace(data=json.dumps(value)), kind)
        assert api.sanitize_for_serialization(found) == value

    through(jobset["metadata"], "V1ObjectMeta")
    job, *_ = container_of(jobset)
    assert set(job) == {"name", "replicas", "template"}
    through(job["template"], "V1JobTemplateSpec")


def test_tpu_slices(manifest):
    jobset = manifest("tpu", RUN_SLICES="2", KUBE_TPU="tpu-v5p-slice", KUBE_TPU_TOPOLOGY="4x4x4", KUBE_TPU_CHIPS="4",
                      RUN_COMMAND="""train --config=digits --config.data.name='a "b" \\c'""")  # fmt: skip
    job, spec, pod, container = container_of(jobset)
    assert job["replicas"] == 2 and spec["parallelism"] == spec["completions"] == 16
    assert container["resources"]["limits"] == {"google.com/tpu": "4"} and "env" not in container
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["command"] == [
        "bash", "-c", "exec /app/launch/flags.sh tpu jax-diffusion train --config=digits "
        """--config.data.name='a "b" \\c' --workdir=runs/digits""",
    ]  # fmt: skip
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bucket"


def test_gpu_hosts_find_process_0(manifest):
    jobset = manifest("gpu", KUBE_GPU_NODES="3", KUBE_GPUS="8", RUN_SPOT="0", RUN_BUCKET="", KUBE_CLAIM="runs")
    _, spec, pod, container = container_of(jobset)
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"] == 3
    env = {e["name"]: e["value"] for e in container["env"]}
    # docs/scaling.md: the third variable is JOB_COMPLETION_INDEX, which the indexed Job sets.
    assert env == {"JAX_COORDINATOR_ADDRESS": "digits-train-0-0.digits:12321", "JAX_NUM_PROCESSES": "3"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_which_status_restarts_all_pods(manifest, kind):
    """The rules as Kubernetes and JobSet read them: the first that matches; FailJob's reason is PodFailurePolicy."""
    jobset = manifest(kind, RESTARTS="7")
    _, spec, pod, _ = container_of(jobset)
    assert pod["restartPolicy"] == "Never" and spec["backoffLimit"] == 0
    (rule,) = spec["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert rule["action"] == "FailJob" and codes["operator"] == "NotIn" and codes["containerName"] == "train"
    assert codes["values"] == sorted(set(codes["values"])) and len(codes["values"]) <= 255
    policy = jobset["spec"]["failurePolicy"]
    (fails,) = policy["rules"]
    assert policy["maxRestarts"] == 7 and fails["action"] == "FailJobSet"

    def restarts(status):
        reason = "BackoffLimitExceeded" if status in codes["values"] else "PodFailurePolicy"
        return reason not in fails["onJobFailureReasons"]

    assert [s for s in (1, 2, 64, 75, 127, 130, 134, 137, 139, 143) if restarts(s)] == [75, 130, 134, 137, 139, 143]


def test_dry_run_of_every_kubernetes_action(kubernetes, fake, parses):
    for words in (("image", "tpu"), ("apply", "tpu"), ("apply", "gpu"), ("log",), ("status",), ("fetch",), ("delete",)):
        done = kubernetes("--dry-run", *words)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        parses(done.stdout)
    assert fake.calls() == []
    log = kubernetes("--dry-run", "log").stdout
    assert log == (
        "kubectl --namespace=default logs --follow --tail=100 --container=train --selector=jobset.sigs.k8s.io/"
        "jobset-name=digits,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0\n"
    )
    image = kubernetes("--dry-run", "image", "gpu").stdout.splitlines()
    assert image == [
        f"docker build --platform=linux/amd64 --file={fake.checkout}/launch/Dockerfile --build-arg=EXTRAS=cuda,data "
        f"--tag=registry/image:1 {fake.checkout}",
        "docker push registry/image:1",
    ]


def test_what_is_shown_is_what_is_created(kubernetes, fake):
    shown = kubernetes("--dry-run", "apply", "gpu").stdout
    assert kubernetes("apply", "gpu").returncode == 0
    text = (fake.base / "manifest").read_text()
    assert shown.endswith(f"kubectl --namespace=default create --filename=- <<'END'\n{text}END\n") and "${" not in text


def test_a_jobset_that_exists_is_left_alone(kubernetes, fake):
    (fake.base / "exists").write_text("jobset.jobset.x-k8s.io/digits\n")
    done = kubernetes("apply", "tpu")
    assert done.returncode == 2 and "there is a JobSet digits already" in done.stderr
    assert not any(" create " in call for call in fake.calls())


def test_fetch_reads_the_folder_with_a_pod_of_its_own(kubernetes, fake):
    with tarfile.open(fake.base / "run.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("metrics.jsonl")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"{}\n"))
    done = kubernetes("fetch")
    assert done.returncode == 0, done.stderr
    assert (fake.cwd / "fetched/digits/metrics.jsonl").read_text() == "{}\n"
    pod = json.loads((fake.base / "manifest").read_text())
    assert pod["kind"] == "Pod" and pod["spec"]["volumes"][0]["name"] == "runs"
    assert fake.calls()[-1].split()[1:4] == ["delete", "pod", "digits-reader"]


@pytest.mark.parametrize("kind, settings, words", [
    ("tpu", {"RUN_BUCKET": ""}, "the pods need a folder that all see: give RUN_BUCKET (on GKE) or KUBE_CLAIM"),
    ("tpu", {"KUBE_TPU_TOPOLOGY": "16"}, "KUBE_TPU_TOPOLOGY=16: give the chips along each axis"),
    ("tpu", {"KUBE_TPU_TOPOLOGY": "2x3"}, "KUBE_TPU_CHIPS=4: so many a host, and 2x3 is 6 chips"),
    ("gpu", {"RUN_SLICES": "2"}, "RUN_SLICES=2: slices are of TPUs"),
])  # fmt: skip
def test_a_wrong_setting_creates_nothing(kubernetes, fake, kind, settings, words):
    done = kubernetes("apply", kind, **settings)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and fake.calls() == []
