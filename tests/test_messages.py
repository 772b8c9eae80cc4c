"""Messages: what a user is told is true, and the advice in it is the right one."""

from conftest import TINY, picture, run


# -- broken images ---------------------------------------------------------------------------------
def test_a_skipped_image_whose_header_is_broken_is_announced(tmp_path, capsys):
    for i in range(20):
        picture(12, 12, seed=i).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "07.png").write_bytes(b"")
    options = [*TINY, "--epochs", 1, "--exp-dir", tmp_path / "run"]
    run(tmp_path, *options, "--skip-broken")
    assert capsys.readouterr().out.count("left out because they are broken: 1,") == 1
