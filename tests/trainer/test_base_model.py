"""Which model is trained: the service's print and template of it, and where it is found."""

import pytest

from inward.backbones.fingerprint import fingerprint as of_the_service
from inward_trainer.base_model import check_same, find_model, name_model
from inward_trainer.errors import OptionsError
from inward_trainer.fingerprint import fingerprint
from inward_trainer.models import load_tokenizer
from inward_trainer.service import Info
from inward_trainer.tokens import Tokeniser
from support.small_policy import DEMO, write_policy


def info(**more):
    known = {"model": "org/served", "revision": "main", "path": "", "fingerprint": "", "template": ""}
    return Info(**known | {"deadline_s": 95.0, "most_samples": 64, "concurrency": 1} | more)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy"))


def test_a_print_is_the_services(policy):
    assert fingerprint(policy) == of_the_service(policy)
    assert fingerprint(DEMO / "backbone") == of_the_service(DEMO / "backbone")


def test_a_model_of_the_same_shapes_and_other_weights_is_another(policy, tmp_path):
    other = write_policy(tmp_path, seed=6)
    tokeniser = Tokeniser(load_tokenizer(other))
    check_same(other, tokeniser, info(fingerprint=of_the_service(other), template=tokeniser.template))
    with pytest.raises(OptionsError, match="is not what the service serves, org/served"):
        check_same(other, tokeniser, info(fingerprint=of_the_service(policy)))


def test_the_services_model_is_taken_from_its_folder_or_from_the_hub(policy):
    assert name_model("service", None, info(path=str(policy))) == (str(policy), None)
    assert name_model("service", None, info(path="/not/on/this/machine")) == ("org/served", "main")
    assert name_model("mine", "v1", info()) == ("mine", "v1")
    with pytest.raises(OptionsError, match="the service's model toy is not on this machine"):
        name_model("service", None, info(model="toy"))


def test_a_folder_that_is_none_of_a_model_is_told(policy, tmp_path):
    assert find_model(str(policy), None) == policy.resolve()
    with pytest.raises(OptionsError, match=r"holds no config.json"):
        find_model(str(tmp_path), None)
    with pytest.raises(OptionsError, match="there is no folder"):
        find_model(str(tmp_path / "nothing"), None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OptionsError, match=r"no \*\.safetensors"):
        fingerprint(tmp_path)
