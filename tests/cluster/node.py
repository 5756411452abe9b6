"""The programs of a control plane with one real node: what they are told beyond the integration tests' flags."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import yaml
from tests.integration.harness import binaries
from tests.integration.harness.api import Api
from tests.integration.harness.control_plane import ControlPlane
from tests.integration.harness.processes import Process, free_ports, wait_until
from tests.integration.harness.programs import CONTROLLERS, Programs

from .machine import PLUGINS
from .places import (
    API_SERVICE_ADDRESS,
    BRIDGE,
    CGROUP,
    DNS_ADDRESS,
    NETWORK,
    NODE_ADDRESS,
    NODE_NAME,
    POD_RANGE,
    SERVICE_RANGE,
    Places,
)

PAUSE_IMAGE = "localhost/finetune-pause:1"
FAKE_GPUS = 8
_NODE_CONTROLLERS = (
    "deployment-controller",
    "disruption-controller",
    "endpoints-controller",
    "endpointslice-controller",
    "node-lifecycle-controller",
    "pod-garbage-collector-controller",
    "replicaset-controller",
    "taint-eviction-controller",
)
# How soon a node that says nothing is given up; the tests that stop the kubelet say how long they wait.
_NODE_GRACE = {"node-monitor-period": "2s", "node-monitor-grace-period": "40s"}


class NodePrograms(Programs):
    """The four programs of the control plane, and the five of a node."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._kubelet_port, self._kubelet_health, self._scheduler_port, *proxy = free_ports(6)
        self._proxy_health, self._proxy_metrics, self._stream_port = proxy
        super().__init__(places.state)
        self.containerd = Process(
            "containerd", ["containerd", "--config", self._containerd_config()], places.state / "containerd.log"
        )
        self.kubelet = Process("kubelet", self._kubelet_command(), places.state / "kubelet.log")
        self.others = [
            self._process("kube-scheduler", self._scheduler_flags()),
            Process("kube-proxy", self._proxy_command(), places.state / "kube-proxy.log"),
            Process("coredns", self._dns_command(), places.state / "coredns.log"),
        ]

    def start_containerd(self) -> None:
        """Start containerd and wait until it answers."""
        self.containerd.start()

        def answers() -> bool:
            self.containerd.check()
            return ctr(self.places, "version", check=False).returncode == 0

        wait_until(answers, "containerd to answer")

    def start_node(self, api: Api) -> None:
        """Start what makes a node of this machine, and wait until pods can be put on it."""
        for process in (*self.others, self.kubelet):
            process.start()

        def ready() -> bool:
            for process in (*self.others, self.kubelet):
                process.check()
            node = api.find("Node", NODE_NAME)
            conditions = (node or {}).get("status", {}).get("conditions", [])
            return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

        wait_until(ready, "the node to be ready", 180)
        self.pretend_gpus(api)

    def pretend_gpus(self, api: Api) -> None:
        """Let the node say that it has GPUs, as a device plugin would; a kubelet that starts forgets it."""
        node = {"kind": "Node", "metadata": {"name": NODE_NAME}}
        api.patch(node, {"status": {"capacity": {"nvidia.com/gpu": str(FAKE_GPUS)}}}, "status")

    def stop_node(self) -> None:
        """Stop what acts on its own; containerd stays, for the clean-up."""
        for process in (self.kubelet, *self.others):
            process.stop()

    def _addresses(self) -> tuple[str, ...]:
        return (NODE_ADDRESS, API_SERVICE_ADDRESS)

    def _write_files(self) -> None:
        super()._write_files()
        self._write_client("kubelet", f"system:node:{NODE_NAME}", "system:nodes")
        self._write_client("scheduler", "system:kube-scheduler")
        self._write_client("proxy", "system:kube-proxy")
        self._write_client("kubelet-client", "kube-apiserver-kubelet-client", "system:masters")

    def _api_server_flags(self) -> dict[str, object]:
        folder = self.places.state
        flags = super()._api_server_flags()
        # Audit lines of every kubelet request would be most of the disk traffic.
        for name in ("endpoint-reconciler-type", "audit-log-path", "audit-policy-file"):
            del flags[name]
        return flags | {
            "bind-address": NODE_ADDRESS,
            "advertise-address": NODE_ADDRESS,
            "allow-privileged": "true",
            "service-cluster-ip-range": SERVICE_RANGE,
            # kubectl logs would else look the node's name up.
            "kubelet-preferred-address-types": "InternalIP",
            "kubelet-client-certificate": folder / "kubelet-client.crt",
            "kubelet-client-key": folder / "kubelet-client.key",
        }

    def _manager_flags(self) -> dict[str, object]:
        return super()._manager_flags() | _NODE_GRACE | {"controllers": ",".join((*CONTROLLERS, *_NODE_CONTROLLERS))}

    def _scheduler_flags(self) -> dict[str, object]:
        kubeconfig = self.places.state / "scheduler.kubeconfig"
        return {
            "kubeconfig": kubeconfig,
            "authentication-kubeconfig": kubeconfig,
            "authorization-kubeconfig": kubeconfig,
            "bind-address": "127.0.0.1",
            "secure-port": self._scheduler_port,
            "leader-elect": "false",
        }

    def _containerd_config(self) -> Path:
        state, cri = self.places.state, 'plugins."io.containerd.grpc.v1.cri"'
        self._network_config()
        path = state / "containerd.toml"
        path.write_text(f"""version = 2
root = "{self.places.cache / "containerd"}"
state = "{state / "containerd"}"
oom_score = 0
[grpc]
  address = "{self.places.socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{state / "opt"}"
[{cri}]
  sandbox_image = "{PAUSE_IMAGE}"
  stream_server_port = "{self._stream_port}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  tolerate_missing_hugetlb_controller = true
  netns_mounts_under_state_dir = true
[{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[{cri}.cni]
  bin_dir = "{PLUGINS}"
  conf_dir = "{state / "cni"}"
""")
        return path

    def _network_config(self) -> None:
        """Pods on one bridge; the node is its gateway. No masquerading: pods have nobody to talk to outside."""
        ranges = [[{"subnet": POD_RANGE}]]
        bridge = {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": ranges,
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": str(self.places.state / "addresses"),
            },
        }
        content = {"cniVersion": "0.4.0", "name": NETWORK, "plugins": [bridge]}
        folder = self.places.state / "cni"
        folder.mkdir(exist_ok=True)
        (folder / "10-finetune.conflist").write_text(json.dumps(content))

    def _kubelet_command(self) -> list[str | Path]:
        state = self.places.state
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": NODE_ADDRESS,
            "port": self._kubelet_port,
            "healthzPort": self._kubelet_health,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(state / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{CGROUP}",
            "clusterDNS": [DNS_ADDRESS],
            "clusterDomain": "cluster.local",
            "containerRuntimeEndpoint": f"unix://{self.places.socket}",
            "enforceNodeAllocatable": [],
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "failCgroupV1": False,
            "failSwapOn": False,
            # What a container may lack: writing to /proc/sys and lowering its oom_score_adj.
            "featureGates": {"KubeletInUserNamespace": True},
            "fileCheckFrequency": "1m0s",
            "imageGCHighThresholdPercent": 100,
            "localStorageCapacityIsolation": False,
            "makeIPTablesUtilChains": False,
            "nodeStatusUpdateFrequency": "4s",
            "podLogsDir": str(state / "pods"),
            "registerNode": True,
            "resolvConf": str(self._resolv_conf()),
            "volumePluginDir": str(state / "volume-plugins"),
        }
        path = state / "kubelet.yaml"
        path.write_text(yaml.safe_dump(config))
        return [
            binaries.ensure("kubelet"),
            f"--config={path}",
            f"--kubeconfig={state / 'kubelet.kubeconfig'}",
            f"--root-dir={state / 'kubelet'}",
            f"--cert-dir={state / 'kubelet-pki'}",
            f"--hostname-override={NODE_NAME}",
            f"--node-ip={NODE_ADDRESS}",
        ]

    def _resolv_conf(self) -> Path:
        """Nothing of the machine's own search list: names of pods are looked up in the cluster only."""
        path = self.places.state / "resolv.conf"
        path.write_text(f"nameserver {DNS_ADDRESS}\n")
        return path

    def _proxy_command(self) -> list[str | Path]:
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(self.places.state / "proxy.kubeconfig")},
            "clusterCIDR": POD_RANGE,
            # Nothing of the machine's own settings is touched.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "healthzBindAddress": f"127.0.0.1:{self._proxy_health}",
            "hostnameOverride": NODE_NAME,
            "iptables": {"localhostNodePorts": False},
            "metricsBindAddress": f"127.0.0.1:{self._proxy_metrics}",
            "mode": "iptables",
            "nodePortAddresses": [f"{NODE_ADDRESS}/32"],
        }
        path = self.places.state / "kube-proxy.yaml"
        path.write_text(yaml.safe_dump(config))
        return [binaries.ensure("kube-proxy"), f"--config={path}"]

    def _dns_command(self) -> list[str | Path]:
        path = self.places.state / "Corefile"
        kubeconfig = self.places.kubeconfig
        path.write_text(
            f".:53 {{\n  bind {DNS_ADDRESS}\n  errors\n  cache 5\n"
            f"  kubernetes cluster.local {{\n    kubeconfig {kubeconfig}\n    ttl 1\n  }}\n}}\n"
        )
        return [binaries.ensure("coredns"), "-conf", path]


class NodeControlPlane(ControlPlane):
    """A control plane whose API server answers on the node's address."""

    def __init__(self, programs: NodePrograms) -> None:
        super().__init__(folder=programs.places.state, kubeconfig=programs.places.kubeconfig, owned=True)
        self._made = programs
        self.keep_folder = True

    def _make_programs(self) -> NodePrograms:
        return self._made


def ctr(places: Places, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Ask our containerd, in the namespace of Kubernetes."""
    command = ["ctr", "--address", str(places.socket), "--namespace", "k8s.io", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=check)
